//! How fast volumes and instances are: EC2's figures as the token buckets that a machine is held to.
//!
//! | type | operations a second | MiB a second |
//! |---|---|---|
//! | gp3 | as provisioned | as provisioned |
//! | gp2 | 3 a GiB, 100 to 16,000; to 3,000 as long as 5.4 million credits last | 128 to 170 GiB, else 250 |
//! | io1 | as provisioned | 256 KiB an operation to 500, then 16 KiB an operation to 1,000 |
//! | io2 | as provisioned | 256 KiB an operation, to 4,000 |
//! | st1 | | 40 a TiB; to 250 a TiB as long as credits of the volume's own size last; 500 at most |
//! | sc1 | | 12 a TiB; to 80 a TiB likewise; 250 at most |
//! | standard | 100, to 200 for a while | 90 |

use hutch_vmm::config::{Flow, Rate};

use crate::host::Speed;
use crate::model::Shape;
use crate::types::{InstanceType, Span};

const MIB: u64 = 1 << 20;
/// Bytes a second of a Mbit a second.
const MBIT: u64 = 1_000_000 / 8;
/// I/O credits of a new gp2 volume, and its speed while it has any.
const CREDITS: u64 = 5_400_000;
const GP2_BURST: u64 = 3000;
/// Seconds for which an instance that has been idle is as fast to its volumes as its type can be: EC2 says half an hour.
const VOLUMES_BURST: u64 = 30 * 60;
/// The same to its network: EC2 says 5 to 60 minutes.
const NETWORK_BURST: u64 = 5 * 60;

/// What goes on steadily: a tenth of a second's worth may come at once.
fn steady(per_second: u64) -> Flow {
    Flow { per_second, burst: (per_second / 10).max(1) }
}

/// What goes on at `baseline` a second, and at `burst` as long as `credits` last.
fn bursting(baseline: u64, burst: u64, credits: u64) -> Vec<Flow> {
    match burst > baseline {
        true => vec![Flow { per_second: baseline, burst: credits.max(1) }, steady(burst)],
        false => vec![steady(baseline)],
    }
}

/// What a volume may do.
pub fn of_volume(shape: &Shape) -> Rate {
    let (gib, iops) = (shape.gib, shape.iops.unwrap_or(0));
    let hdd = |baseline: u64, burst: u64, most: u64| {
        let of = |mib_a_tib: u64| (mib_a_tib * MIB * gib / 1024).min(most * MIB);
        Rate { ops: vec![], bytes: bursting(of(baseline), of(burst), gib << 30) }
    };
    let ssd = |ops: Vec<Flow>, bytes: u64| Rate { ops, bytes: vec![steady(bytes)] };
    match shape.kind.as_str() {
        "gp3" => ssd(vec![steady(iops)], shape.throughput.unwrap_or(125) * MIB),
        "gp2" => ssd(bursting(iops, GP2_BURST, CREDITS), if gib <= 170 { 128 } else { 250 } * MIB),
        "io1" => {
            let bytes = (iops * (256 << 10)).min(500 * MIB).max(iops * (16 << 10)).min(1000 * MIB);
            ssd(vec![steady(iops)], bytes)
        }
        "io2" => ssd(vec![steady(iops)], (iops * (256 << 10)).min(4000 * MIB)),
        "st1" => hdd(40, 250, 500),
        "sc1" => hdd(12, 80, 250),
        "standard" => ssd(bursting(100, 200, 6000), 90 * MIB),
        _ => Rate::default(),
    }
}

/// What an instance of a type may do, beside what each of its volumes may. What its type does not say has no limit.
pub fn of_instance(kind: &InstanceType) -> Speed {
    let flows = |span: Option<Span>, unit: u64, seconds: u64| {
        let flows = |Span { baseline, burst }: Span| {
            bursting(baseline * unit, burst * unit, (burst - baseline.min(burst)) * unit * seconds)
        };
        span.map(flows).unwrap_or_default()
    };
    Speed {
        volumes: Rate {
            ops: flows(kind.volume_iops, 1, VOLUMES_BURST),
            bytes: flows(kind.volume_mbit, MBIT, VOLUMES_BURST),
        },
        network: Rate { ops: vec![], bytes: flows(kind.network_mbit, MBIT, NETWORK_BURST) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Table;

    fn volume(kind: &str, gib: u64) -> Rate {
        of_volume(&Shape::new(Some(kind), gib, None, None).unwrap())
    }

    /// Per second, of the operations and of the MiB.
    fn figures(rate: &Rate) -> (Vec<u64>, Vec<u64>) {
        let per_second = |flows: &[Flow], unit| flows.iter().map(|flow| flow.per_second / unit).collect();
        assert_eq!(rate.wrong(), None);
        (per_second(&rate.ops, 1), per_second(&rate.bytes, MIB))
    }

    #[test]
    fn volumes_are_as_fast_as_ec2_says() {
        assert_eq!(figures(&volume("gp3", 1)), (vec![3000], vec![125]));
        assert_eq!(figures(&volume("gp2", 8)), (vec![100, 3000], vec![128]));
        assert_eq!(volume("gp2", 8).ops[0].burst, 5_400_000);
        assert_eq!(figures(&volume("gp2", 500)), (vec![1500, 3000], vec![250]));
        assert_eq!(figures(&volume("gp2", 1000)), (vec![3000], vec![250]), "no credits are needed");
        assert_eq!(figures(&volume("gp2", 16_384)), (vec![16_000], vec![250]));
        assert_eq!(figures(&volume("st1", 2048)), (vec![], vec![80, 500]));
        assert_eq!(volume("st1", 2048).bytes[0].burst, 2 << 40);
        assert_eq!(figures(&volume("st1", 16_384)), (vec![], vec![500]));
        assert_eq!(figures(&volume("sc1", 1024)), (vec![], vec![12, 80]));
        assert_eq!(figures(&volume("standard", 10)), (vec![100, 200], vec![90]));
        for (kind, gib, iops, mib) in [
            ("io1", 100, 1000, 250),
            ("io1", 1000, 32_000, 500),
            ("io1", 2000, 64_000, 1000),
            ("io2", 4, 4000, 1000),
            ("io2", 1000, 256_000, 4000),
        ] {
            let shape = Shape::new(Some(kind), gib, Some(iops), None).unwrap();
            assert_eq!(figures(&of_volume(&shape)), (vec![iops], vec![mib]), "{kind} {iops}");
        }
    }

    #[test]
    fn instances_are_as_fast_as_their_types_say() {
        let table = Table::built_in();
        let micro = of_instance(table.get("t3.micro").unwrap());
        assert_eq!(micro.volumes.ops[0], Flow { per_second: 500, burst: 11_300 * 1800 });
        assert_eq!(micro.volumes.ops[1].per_second, 11_800);
        assert_eq!(micro.volumes.bytes[1].per_second, 2085 * MBIT);
        assert_eq!(micro.network.bytes[0].per_second, 64 * MBIT);
        assert_eq!(micro.network.bytes[1].per_second, 5000 * MBIT);
        assert_eq!(of_instance(table.get("m5.8xlarge").unwrap()).network.bytes, [steady(10_000 * MBIT)]);
        assert_eq!(of_instance(table.get("t2.micro").unwrap()), Speed::default(), "EC2 says nothing");
        for (name, kind) in table.all() {
            let speed = of_instance(kind);
            assert_eq!(speed.volumes.wrong().or(speed.network.wrong()), None, "{name}");
        }
    }
}
