"""Recipes: small pure pieces that make a model sparse at less loss. recipe.py puts together what a config asks for."""
