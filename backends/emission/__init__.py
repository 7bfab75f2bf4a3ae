"""From a plan to source, whatever the framework: what every backend shares.

language     what a backend says of itself: how each op and each conversion is written
target       the mesh of a program, sizes of local shards
blocks       the distinct blocks; `stages`: which segments run in which loops; `wiring`: what flows
body         statements over typed values; `lines` makes them from ops, `conversions` says what
             moves, `peephole` joins them, `naming` writes them down
counting     the number of loss terms; `parameters`: parameters.py; `batch`: the batch's tensors
text         source text: names, indentation, imports, formatting
"""
