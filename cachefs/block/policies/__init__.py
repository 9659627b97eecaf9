"""What leaves a tier next: the policies behind `cachefs.block.ports.EvictionPolicy` (docs/EVICTION.md)."""
