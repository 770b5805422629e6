"""HDF5 and Keras files."""
