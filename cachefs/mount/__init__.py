"""A mount and its processes: the supervisor, its worker, and what starts and ends them."""
