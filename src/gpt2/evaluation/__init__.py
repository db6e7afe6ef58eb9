"""Evaluation of a model: loss, HellaSwag."""
