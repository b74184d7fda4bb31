//! AMIs: templates, import, and reading the boot configuration off a guest disk.
