"""The layers that a decoder is made of, each holding only its rank's slice of the weights."""
