"""What the file system means: names, attributes, listings and reads, as plain classes that need no mount."""
