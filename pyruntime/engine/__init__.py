"""The engine: executes step plans of mixture-of-experts models on the native operators."""
