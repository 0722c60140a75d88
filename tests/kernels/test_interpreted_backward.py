"""The Triton kernels of the backward pass and of rounds over a picture, in Triton's interpreter."""

from interpreted import BACKWARD, Interpreted


class TestBackward(Interpreted):
    names = BACKWARD
