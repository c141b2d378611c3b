"""What can be known of the kernels without a GPU; nothing here times them."""
