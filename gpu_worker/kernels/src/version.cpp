// Which sources the library was built from.

extern "C" const char* fb_source_digest() { return FB_SOURCE_DIGEST; }
