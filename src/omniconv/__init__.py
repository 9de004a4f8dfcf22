"""Every convolution a network designer reaches for, under one equation and one API."""

from importlib.metadata import version

from omniconv import functional, nn
from omniconv.problem import Problem
from omniconv.settings import precise
from omniconv.streaming import streaming
from omniconv.techniques import TECHNIQUES

__version__ = version("omniconv")

__all__ = ["TECHNIQUES", "Problem", "__version__", "functional", "nn", "precise", "streaming"]
