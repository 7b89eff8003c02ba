"""What concerns the machine: files, devices, threads, progress, tables on the terminal."""
