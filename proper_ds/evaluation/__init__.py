"""Prediction, LaMP's metrics, methods and the report."""
