"""The native engines, one file a kernel family: which calls they take, their raw operators as torch sees them, their gradients."""
