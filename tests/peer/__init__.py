"""Peers: membership, placement and transfer, against real servers on loopback."""
