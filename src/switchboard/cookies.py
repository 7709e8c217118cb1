"""Cookies of those whom we ask: none are kept, for one host's could be sent to another's."""

from http.cookiejar import CookieJar, DefaultCookiePolicy


def no_cookies() -> CookieJar:
    """What takes no cookies, and so has none to send."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))
