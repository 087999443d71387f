"""Scores a language model on multiple-choice tasks with a public scorer, and the rows for it."""
