"""One test body per port, run against every implementation of it."""
