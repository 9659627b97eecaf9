"""One module per system that is measured, each behind the same small Protocol (`bench.systems.port`)."""
