"""From documents to shards to the rows of a step."""
