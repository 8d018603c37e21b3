"""Web pages as environments: a browser, what can be done to a screen, and demonstrators that read the page."""
