//! The CMOS clock (Motorola MC146818) at ports 0x70 and 0x71: the host's time in UTC, as EC2's machines keep it. It has no
//! alarms and no interrupts, and says so; a guest's writes to the time are lost, those to the CMOS memory are kept.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::Registers;

/// The index port; the data port follows it.
pub const PORT: u64 = 0x70;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
/// The century, where PCs keep it and ACPI's FADT can name it.
const CENTURY: usize = 0x32;
/// Register A: divider on, periodic rate 1024 Hz; the update bit is never seen set.
const A_RUNNING: u8 = 0x26;
/// Register B: 24-hour mode, binary-coded decimal.
const B_24_HOURS: u8 = 0x02;
/// Register D: the battery is good.
const D_VALID: u8 = 0x80;

/// The clock.
pub struct CmosClock {
    index: usize,
    memory: [u8; 128],
    now: fn() -> u64,
}

impl Default for CmosClock {
    fn default() -> Self {
        CmosClock { index: 0, memory: [0; 128], now: unix_now }
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn bcd(value: u64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month (1 to 12) and day (1 to 31) of the `days`-th day since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that the leap day is the last of its year, in eras of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day - (153 * shifted + 2) / 5 + 1)
}

impl CmosClock {
    fn register(&self) -> u8 {
        let now = (self.now)();
        let days = now / 86_400;
        match self.index {
            0 => bcd(now % 60),
            2 => bcd(now / 60 % 60),
            4 => bcd(now / 3600 % 24),
            // Sunday is 1; 1970-01-01 was a Thursday.
            6 => bcd((days + 4) % 7 + 1),
            7 => bcd(civil(days).2),
            8 => bcd(civil(days).1),
            9 => bcd(civil(days).0 % 100),
            REG_A => A_RUNNING,
            REG_B => B_24_HOURS,
            REG_C => 0,
            REG_D => D_VALID,
            CENTURY => bcd(civil(days).0 / 100),
            index => self.memory[index],
        }
    }
}

impl Registers for CmosClock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [value]) = (offset, data) {
            *value = self.register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // The top bit of the index masks NMI; there is none.
            (0, [index]) => self.index = usize::from(index & 0x7f),
            (1, [value]) => self.memory[self.index] = *value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(clock: &mut CmosClock, index: u8) -> u8 {
        let mut value = [0];
        clock.write(0, &[index]);
        clock.read(1, &mut value);
        value[0]
    }

    #[test]
    fn the_time_is_told_in_bcd() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let mut clock = CmosClock { now: || 1_709_251_198, ..CmosClock::default() };
        let time = [0x32, 9, 8, 7, 6, 4, 2, 0].map(|r| read(&mut clock, r));
        assert_eq!(time, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        assert_eq!(read(&mut clock, 0x8d), D_VALID, "the NMI bit is no part of the index");
    }

    #[test]
    fn dates_around_leap_days_and_centuries() {
        for (days, date) in
            [(0, (1970, 1, 1)), (11_016, (2000, 2, 29)), (11_017, (2000, 3, 1)), (47_541, (2100, 3, 1))]
        {
            assert_eq!(civil(days), date);
        }
    }

    #[test]
    fn memory_is_kept_and_the_clock_is_not_set() {
        let mut clock = CmosClock { now: || 0, ..CmosClock::default() };
        clock.write(0, &[0x40]);
        clock.write(1, &[7]);
        clock.write(0, &[4]);
        clock.write(1, &[9]);
        assert_eq!((read(&mut clock, 0x40), read(&mut clock, 4)), (7, 0));
        let mut wide = [0; 4];
        clock.read(1, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }
}
