"""What is known of model families, by structure: attention heads and the widths that are coupled to them."""
