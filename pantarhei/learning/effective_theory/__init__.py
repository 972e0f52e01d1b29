"""The effective theory of deep networks of finite width and depth ("pdlt", arXiv 2106.10165).

An untrained multilayer perceptron is Gaussian at infinite width; at large width n its leading
corrections are a handful of numbers a layer, all growing as depth over width. ``recursions``
computes them, ``monte_carlo`` measures them over random networks, ``training`` turns them into
initialisation, learning rates and an infinite-width predictor for your own model and data, and
``advice`` says how wide, how deep and how non-Gaussian.
"""
