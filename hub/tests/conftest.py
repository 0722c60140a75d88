def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: run by the continuous integration of kernels on the Hub")
