"""Activation-sparse language models in JAX: swap the activation, train on, measure the zeros, decode with them."""
