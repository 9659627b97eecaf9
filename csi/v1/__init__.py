"""The messages and services of CSI, generated from its proto file by `scripts/csi-stubs`. Never edited by hand."""
