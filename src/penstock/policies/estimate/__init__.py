"""Estimators that the policies of one stack share: `context.shared(Estimator)`. One file an estimator."""
