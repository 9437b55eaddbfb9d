"""One line of data: the forms that are accepted, the values that are refused, and samples that cannot be used."""
