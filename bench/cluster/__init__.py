"""What peers are worth: nodes that read one dataset, with and without each other (`python -m bench.cluster`)."""
