"""How good is this draft?"""
