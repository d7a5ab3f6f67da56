"""The metrics of the field as plain functions over tensors, arrays and strings; nothing here knows a model."""
