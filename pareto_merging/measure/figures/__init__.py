"""Pictures that compare merging methods, one file a picture."""
