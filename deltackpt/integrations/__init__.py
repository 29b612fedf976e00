"""Integrations: other people's trainers, given a store to save to.

Owns   nothing; each module is for one framework, and imports it.
Never  is imported by the package itself.
"""
