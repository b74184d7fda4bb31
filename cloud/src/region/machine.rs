//! What the host is told of an instance.

use crate::fault::{Fault, Result};
use crate::host::{self, Machine};
use crate::model::{Group, Instance, Interface, Subnet};

use crate::types::GB;

use super::{Region, bundles};

impl Region {
    /// The machine as the host is told of it.
    pub(super) fn machine(&self, instance: &Instance) -> Result<Machine> {
        let kind = self.settings.types.get(&instance.instance_type).map_err(Fault::internal)?;
        let mut interfaces = Vec::new();
        let (mut groups, mut cards) = (Vec::new(), Vec::new());
        for id in &instance.interfaces {
            let Some(interface) = self.get::<Interface>(id)? else { continue };
            let own = interface.groups.iter().map(|id| self.get::<Group>(id));
            let own: Vec<_> = own.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
            cards.push(super::metadata::card(self, &interface, &own));
            groups.extend(own);
            interfaces.push(host::Interface {
                id: interface.id.clone(),
                mac: interface.mac.clone(),
                ip: interface.ip,
                more: interface.more.clone(),
                subnet: self.get::<Subnet>(&interface.subnet)?.map(|subnet| subnet.cidr),
                network: self.network(&interface)?,
                public: interface.public.map(|public| self.public(public.ip)),
                groups: interface.groups,
            });
        }
        self.tell_groups(&groups)?;
        let root = instance.bundle.as_ref().map(|_| bundles::root_of(&instance.id));
        let key = self.public_key(instance)?;
        let metadata = super::metadata::describe(self, instance, cards, key.as_ref());
        Ok(Machine {
            id: instance.id.clone(),
            run: instance.run,
            uuid: instance.uuid.clone(),
            vcpus: kind.vcpus,
            memory_mib: kind.memory_mib,
            kernel: instance.kernel.clone(),
            ramdisk: instance.ramdisk.clone(),
            volumes: root
                .into_iter()
                .chain(instance.devices.iter().map(|device| device.volume.clone()))
                .collect(),
            stores: kind.instance_store.iter().map(|gb| gb * GB).collect(),
            interfaces,
            speed: self.speed_of(kind),
            metadata,
        })
    }
}
