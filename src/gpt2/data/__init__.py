"""Documents become token shards; the sampler chooses the rows of them that a step reads."""
