"""The CSI driver, over its real socket."""
