"""The command line: reads options, environment and files, and is the only layer that talks to a person."""
