"""The ops of the namespace ``dynaprune::``, one file per family: schema, dispatch, fake, autograd and FLOP
formula.

Schemas are defined in Python and not in C++, so that the same ops exist without the compiled extension.
``index`` is the packed index of a :class:`~dynaprune_kernels.layout.BlockLayout`; ``conv`` are the nine ints
of a
:class:`~dynaprune_kernels.geometry.ConvGeometry`; ``block`` are the two of a
:class:`~dynaprune_kernels.geometry.Block`.

``tap`` is a float ``[2, rows * columns]`` leaf whose *gradient* carries what only backward can see: row 0
the signed sum of weight x gradient of each live block, row 1 the squared norm of the dense gradient at each
block that is not live, the latter only while the bool tensor ``probe`` is true. A tap of three rows then also
gets, in row 2, the mean square of the inputs that each block reads.
"""

from dynaprune_kernels.ops import conv2d, inputs, layout_update, linear, saliency

__all__ = ["conv2d", "inputs", "layout_update", "linear", "saliency"]
