"""What things cost: one script a question, each beside a named peer in the same run, each printing a ratio."""
