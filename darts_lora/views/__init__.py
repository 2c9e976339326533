"""What people see of a search: tables on the screen, pictures, TensorBoard, the report.
Not here: the figures themselves."""
