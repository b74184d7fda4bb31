//! The kernel's console on the command line: `/dev/console` is the *last* `console=` (kernel,
//! admin-guide/serial-console), and the guest's console output is read from its first serial port.

/// What is added where the image does not set up its serial port itself.
const SERIAL: &str = "console=ttyS0,115200n8";

/// Gives `cmdline` with `ttyS0` as the last console, so that init's output reaches the serial port. Options that the
/// image gave its `ttyS0` (speed, parity) are kept, other consoles stay, and what follows `--` is left to init.
pub fn with_serial_console(cmdline: &str) -> String {
    let words = split(cmdline);
    let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (kernel, init) = words.split_at(end);

    let serial = kernel.iter().rev().find(|word| is_ttys0(word)).copied().unwrap_or(SERIAL);
    let others = kernel.iter().filter(|word| !is_ttys0(word)).copied();
    let result: Vec<&str> = others.chain([serial]).chain(init.iter().copied()).collect();
    result.join(" ")
}

/// Whether this parameter is `console=ttyS0`, with or without options.
fn is_ttys0(word: &str) -> bool {
    word.strip_prefix("console=ttyS0").is_some_and(|rest| rest.is_empty() || rest.starts_with(','))
}

/// Splits at white space outside of double quotes, as the kernel does (lib/cmdline.c, `next_arg`).
pub(super) fn split(cmdline: &str) -> Vec<&str> {
    let mut quoted = false;
    cmdline
        .split(move |c: char| {
            quoted ^= c == '"';
            c.is_ascii_whitespace() && !quoted
        })
        .filter(|word| !word.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_port_becomes_the_last_console() {
        assert_eq!(with_serial_console(""), "console=ttyS0,115200n8");
        assert_eq!(with_serial_console("root=/dev/vda1 ro"), "root=/dev/vda1 ro console=ttyS0,115200n8");
        assert_eq!(with_serial_console("console=ttyS0 console=tty1 ro"), "console=tty1 ro console=ttyS0");
    }

    #[test]
    fn the_images_own_speed_is_kept_and_named_once() {
        assert_eq!(
            with_serial_console("console=ttyS0,9600 console=tty0 console=ttyS0,115200 quiet"),
            "console=tty0 quiet console=ttyS0,115200"
        );
    }

    #[test]
    fn other_ports_inits_arguments_and_quotes_are_left_alone() {
        assert_eq!(
            with_serial_console("console=ttyS01 a=\"x  console=ttyS0 -- y\" -- single console=ttyS0"),
            "console=ttyS01 a=\"x  console=ttyS0 -- y\" console=ttyS0,115200n8 -- single console=ttyS0"
        );
    }
}
