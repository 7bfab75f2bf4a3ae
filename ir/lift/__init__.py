"""From a traced draft to a `Model`, whatever framework traced it.

draft        the graph while it is being lifted; dims: sizes in it
evaluate     what a tracer must be able to evaluate; patterns: formulas as expressions
lifting      all of what follows, in order
attention, rotary, loss, pointwise   formulas that are one op of the table
masks, rotary_tables                 what masks and tables are, by their values
statics, views                       what is left, made simpler
pieces       consecutive ops drawn as raw graphs; naming: names of values and ops
assemble     equal pieces become one block, cut runs grow back: the model
"""
