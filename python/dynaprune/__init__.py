"""Neural networks that get smaller and faster while they train."""
