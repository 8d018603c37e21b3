"""From the features of a tower to the tokens of a backbone."""
