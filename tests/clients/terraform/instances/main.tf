# What a usual user has: a key, a firewall, a web server with a data disk, backups of it, an image of it.

terraform {
  required_providers {
    aws = { source = "hashicorp/aws" }
  }
}

variable "endpoint" { type = string }
variable "region" { type = string }
variable "public_key" { type = string }
variable "stage" { default = "test" }
variable "open_port" { default = 443 }
variable "type" { default = "t3.micro" }

provider "aws" {
  region                      = var.region
  skip_region_validation      = true
  skip_metadata_api_check     = true
  skip_credentials_validation = false

  endpoints {
    ec2 = var.endpoint
    sts = var.endpoint
  }
  default_tags {
    tags = { project = "hutch" }
  }
}

data "aws_caller_identity" "me" {}

data "aws_availability_zones" "all" {
  state = "available"
}

data "aws_vpc" "default" {
  default = true
}

data "aws_subnets" "default" {
  filter {
    name   = "vpc-id"
    values = [data.aws_vpc.default.id]
  }
}

data "aws_subnet" "first" {
  vpc_id            = data.aws_vpc.default.id
  availability_zone = data.aws_availability_zones.all.names[0]
  default_for_az    = true
}

data "aws_ami" "debian" {
  most_recent = true
  owners      = ["self"]

  filter {
    name   = "name"
    values = ["debian-12"]
  }
}

resource "aws_key_pair" "user" {
  key_name   = "user"
  public_key = var.public_key
}

resource "aws_security_group" "web" {
  name        = "web"
  description = "web servers"
  vpc_id      = data.aws_vpc.default.id

  ingress {
    description = "http"
    from_port   = 80
    to_port     = 80
    protocol    = "tcp"
    cidr_blocks = ["0.0.0.0/0", "10.0.0.0/8"]
  }
  ingress {
    from_port = 9100
    to_port   = 9100
    protocol  = "tcp"
    self      = true
  }
  egress {
    from_port   = 0
    to_port     = 0
    protocol    = "-1"
    cidr_blocks = ["0.0.0.0/0"]
  }
  tags = { Name = "web", stage = var.stage }
}

resource "aws_security_group" "separate" {
  name_prefix = "separate-"
  vpc_id      = data.aws_vpc.default.id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "https" {
  security_group_id = aws_security_group.separate.id
  description       = "https"
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = var.open_port
  to_port           = var.open_port
  tags              = { Name = "https", stage = var.stage }
}

resource "aws_vpc_security_group_ingress_rule" "web" {
  security_group_id            = aws_security_group.separate.id
  referenced_security_group_id = aws_security_group.web.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "all" {
  security_group_id = aws_security_group.separate.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "-1"
}

resource "aws_security_group" "older" {
  name   = "older"
  vpc_id = data.aws_vpc.default.id
}

resource "aws_security_group_rule" "ssh" {
  security_group_id = aws_security_group.older.id
  type              = "ingress"
  protocol          = "tcp"
  from_port         = 22
  to_port           = 22
  cidr_blocks       = ["10.0.0.0/8", "192.168.0.0/16"]
  description       = "ssh"
}

resource "aws_security_group_rule" "from_web" {
  security_group_id        = aws_security_group.older.id
  type                     = "ingress"
  protocol                 = "icmp"
  from_port                = -1
  to_port                  = -1
  source_security_group_id = aws_security_group.web.id
}

resource "aws_instance" "web" {
  ami                    = data.aws_ami.debian.id
  instance_type          = var.type
  key_name               = aws_key_pair.user.key_name
  subnet_id              = data.aws_subnet.first.id
  vpc_security_group_ids = [aws_security_group.web.id, aws_security_group.separate.id]
  user_data              = "#!/bin/sh\necho hello\n"
  monitoring             = true

  root_block_device {
    volume_size = 4
    volume_type = "gp3"
  }
  ebs_block_device {
    device_name = "/dev/sdf"
    volume_size = 8
    iops        = 3500
    volume_type = "gp3"
  }
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 2
    instance_metadata_tags      = "enabled"
  }
  tags        = { Name = "web", stage = var.stage }
  volume_tags = { Name = "web disk", stage = var.stage }
}

# Stopped: its disks come and go.
resource "aws_instance" "worker" {
  ami           = data.aws_ami.debian.id
  instance_type = "t3.nano"
  tags          = { Name = "worker" }
}

resource "aws_ec2_instance_state" "worker" {
  instance_id = aws_instance.worker.id
  state       = "stopped"
}

resource "aws_ebs_volume" "data" {
  availability_zone = aws_instance.worker.availability_zone
  size              = 3
  type              = "gp3"
  tags              = { Name = "data", stage = var.stage }
}

resource "aws_volume_attachment" "data" {
  device_name = "/dev/sdh"
  volume_id   = aws_ebs_volume.data.id
  instance_id = aws_ec2_instance_state.worker.instance_id
}

resource "aws_ebs_snapshot" "backup" {
  volume_id   = aws_ebs_volume.data.id
  description = "backup"
  tags        = { Name = "backup", stage = var.stage }
}

resource "aws_ebs_snapshot_copy" "backup" {
  source_snapshot_id = aws_ebs_snapshot.backup.id
  source_region      = var.region
}

resource "aws_snapshot_create_volume_permission" "backup" {
  snapshot_id = aws_ebs_snapshot.backup.id
  account_id  = "111122223333"
}

resource "aws_ebs_volume" "restored" {
  availability_zone = data.aws_availability_zones.all.names[0]
  snapshot_id       = aws_ebs_snapshot.backup.id
}

resource "aws_ami_from_instance" "web" {
  name               = "web image"
  source_instance_id = aws_instance.web.id
  tags               = { Name = "web image" }
}

resource "aws_ami" "registered" {
  name                = "registered"
  virtualization_type = "hvm"
  root_device_name    = "/dev/sda1"

  ebs_block_device {
    device_name = "/dev/sda1"
    snapshot_id = aws_ebs_snapshot.backup.id
    volume_size = 3
  }
}

resource "aws_ami_copy" "web" {
  name              = "web copy"
  source_ami_id     = aws_ami_from_instance.web.id
  source_ami_region = var.region
}

resource "aws_ami_launch_permission" "web" {
  image_id   = aws_ami_from_instance.web.id
  account_id = "111122223333"
}

resource "aws_launch_template" "web" {
  name                   = "web"
  image_id               = data.aws_ami.debian.id
  instance_type          = "t3.small"
  key_name               = aws_key_pair.user.key_name
  vpc_security_group_ids = [aws_security_group.web.id]
  user_data              = base64encode("#!/bin/sh\n")
  update_default_version = true

  block_device_mappings {
    device_name = "/dev/sdf"
    ebs {
      volume_size           = 2
      volume_type           = "gp3"
      delete_on_termination = true
    }
  }
  metadata_options {
    http_tokens = "required"
  }
  monitoring {
    enabled = true
  }
  tag_specifications {
    resource_type = "instance"
    tags          = { Name = "of a template" }
  }
}

resource "aws_instance" "of_template" {
  launch_template {
    id      = aws_launch_template.web.id
    version = "$Default"
  }
  instance_type                        = "t3.nano"
  instance_initiated_shutdown_behavior = "terminate"

  lifecycle {
    # The provider hashes the hash of a template's user data anew at each plan, on EC2 as well (its issue 30825).
    ignore_changes = [user_data]
  }
}

# A tag on what another module has made.
resource "aws_ec2_tag" "worker" {
  resource_id = aws_instance.of_template.primary_network_interface_id
  key         = "watched"
  value       = var.stage
}

output "account" { value = data.aws_caller_identity.me.account_id }
output "zones" { value = data.aws_availability_zones.all.names }
output "subnets" { value = data.aws_subnets.default.ids }
output "web" { value = aws_instance.web.id }
output "web_ip" { value = aws_instance.web.private_ip }
output "worker" { value = aws_instance.worker.id }
output "group" { value = aws_security_group.separate.id }
output "data" { value = aws_ebs_volume.data.id }
output "images" { value = [aws_ami_from_instance.web.id, aws_ami.registered.id, aws_ami_copy.web.id] }
