"""Every convolution a network designer reaches for, under one equation and one API."""
