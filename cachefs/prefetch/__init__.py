"""What will be wanted next."""
