"""Peers: members, placement and transfer between nodes. Reserved; empty in this version."""
