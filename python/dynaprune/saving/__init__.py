"""Files and state dicts that carry a structure: manifest, checkpoints, pretrained folders."""
