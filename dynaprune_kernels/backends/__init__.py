"""One module per backend, all with the same functions, and the choice between them."""
