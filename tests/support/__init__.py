"""What tests share: writers of checkpoint files, benign and hostile."""
